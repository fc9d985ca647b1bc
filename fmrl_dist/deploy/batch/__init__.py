"""Lists for any number of users: histories in, lists out, in parts that processes share and that outlive a kill."""
