"""`hiermem serve`: OpenAI's API, the routes of the memory, and the page."""
