"""The audit of photographs and their tables: what would make a result wrong, before anybody trains.

`reading` takes tables in with their mistakes, `looks` decodes every file once, `hashes` finds which could be copies,
`copies` decides which are, `judge` makes findings of it all, `fix` says which rows to leave out, `page` shows it.
docs/audit.md explains every finding.
"""
