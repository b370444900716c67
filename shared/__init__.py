"""The ground that the three stages stand on. Imports no stage; a module is here once two stages need it."""
