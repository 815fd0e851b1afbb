"""The service as tools for language models, over the Model Context Protocol: on stdio, and at ``/mcp``."""
