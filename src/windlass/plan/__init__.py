"""What will run, as data: frozen dataclasses and the functions that build them; standard library only."""
