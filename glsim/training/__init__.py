"""Training runs: loop, resume, protocol, tables, memory."""
