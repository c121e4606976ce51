"""What one volunteer runs: finetune on private data, fuse the shared backbone. See ARCHITECTURE.md."""
