"""The configuration: sections of frozen dataclasses, read from YAML and the command line."""
