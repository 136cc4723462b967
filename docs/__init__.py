"""The documentation: pages in Markdown, and the scripts that write the generated ones."""
