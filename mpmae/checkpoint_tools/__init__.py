"""What can be done with a checkpoint without the run that wrote it: look, convert, remove (`mpmae-checkpoint`)."""
