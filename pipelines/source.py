"""The name under which version 0.1.0 published what is in `pipelines.read.source` now."""

from pipelines.read.base import Source
from pipelines.read.beton import BetonSource
from pipelines.read.folder import FolderSource
from pipelines.read.source import JoinedSource, open_source

__all__ = ["BetonSource", "FolderSource", "JoinedSource", "Source", "open_source"]
