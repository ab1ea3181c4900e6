"""Pages, tables and pictures that are made of records."""
