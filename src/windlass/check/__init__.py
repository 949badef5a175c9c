"""What must hold before anything runs.  A check raises with the place."""
