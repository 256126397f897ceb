"""Reading, grading and drawing for the stages; data, and the scripts that make it."""
