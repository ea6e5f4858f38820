"""What a run leaves on disk: its lines, its summary, where it stands, and what it ran on."""
