"""One command for each table of figures in the docs; peers run beside ours in the same command."""
