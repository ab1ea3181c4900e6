"""Files and names of other projects: read without being executed, renamed by tables."""
