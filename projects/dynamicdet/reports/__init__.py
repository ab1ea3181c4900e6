"""Pages and tables from records."""
