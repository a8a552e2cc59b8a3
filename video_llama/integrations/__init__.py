"""Other people's engines: each file imports its engine, and is imported only where that engine is used."""
