"""People: accounts and what they do with papers. Functions over the store; no HTTP here."""
