"""Studies that make the pictures and tables in docs/. Each is one command, and what it shows is written beside it as JSON."""
