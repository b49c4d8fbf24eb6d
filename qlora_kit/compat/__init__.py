"""Other libraries' names over this toolkit's objects, so that existing scripts run here."""
