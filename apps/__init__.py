"""What people use: the command line, the server with its page, the demo, pictures of a bank, Swift."""
