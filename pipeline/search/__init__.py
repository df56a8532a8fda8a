"""Better takes without training: searches over the noise of an unchanged model, one file a method."""
