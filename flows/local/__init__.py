"""The local servers: settings, ports, start and end."""
