"""What runs units: supervised processes, and how a run is stopped."""
