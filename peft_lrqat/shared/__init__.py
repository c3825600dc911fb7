"""What both tuners, the export and the trainer build on; knows neither method."""
