"""What several scorers share: networks, preprocessing, protocols, question sheets."""
