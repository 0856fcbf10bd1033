"""Tasks: text with a known answer at a known place, as `dhlens.episode.Episode`s. They never see a model."""
