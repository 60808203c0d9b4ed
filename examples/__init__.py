"""Training loops of other projects with SRA 2 (docs/use-elsewhere.md)."""
