"""The learner: replays groups with gradients on, accumulates, and takes optimiser steps."""
