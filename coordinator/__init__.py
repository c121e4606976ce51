"""How peers agree among themselves, without a server. See ARCHITECTURE.md."""
