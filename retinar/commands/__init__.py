"""One module per verb of the command line; cli.py collects them."""
