"""Other libraries' losses served by our operators; each module needs the library that it names, and imports it late."""
