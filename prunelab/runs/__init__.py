"""What every run needs: its folder, seeds, threads and provenance."""
