"""Exporters that come with sqakd-deploy: integer graphs as files that runtimes execute."""
