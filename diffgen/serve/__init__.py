"""Serve a model over HTTP: guard → queue → worker process → gallery; three APIs, a page. No torch in this process."""
