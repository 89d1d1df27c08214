"""What reading rows from PostgreSQL and writing them to it have in common: driver, addresses, and errors."""
