"""The networks: backbones, head, batch norm over ranks, and their arithmetic."""
