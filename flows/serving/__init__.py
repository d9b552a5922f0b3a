"""Models over HTTP, in the manner of OpenAI's interface. The only place that imports a web framework."""
