"""fMRLRec and its nested operators (paper section 3). Knows no process, file or configuration object."""
