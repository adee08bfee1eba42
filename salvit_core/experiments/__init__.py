"""What is run and recorded: runs as plain data, their records, and the tables that notebooks show."""
