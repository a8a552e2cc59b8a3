"""The connectors beside the published one: one file each."""
