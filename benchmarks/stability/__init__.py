"""The papers' claims about depth beside what this library measures; see docs/stability.md."""
