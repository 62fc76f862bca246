"""The name under which version 0.1.0 published what is in `pipelines.read.source` now."""

from pipelines.read.source import BetonSource, FolderSource, JoinedSource, Source, open_source

__all__ = ["BetonSource", "FolderSource", "JoinedSource", "Source", "open_source"]
