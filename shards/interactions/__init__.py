"""Events of any number, from raw tables to histories, on an embedded engine that works out of core."""
