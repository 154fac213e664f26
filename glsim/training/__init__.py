"""Training runs: loop, checkpoints and resume, recipes, the paper's protocol, tables, memory."""
