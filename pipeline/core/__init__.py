"""The ground floor: records, errors, tensors, files, prompts and media. Imports nothing else of Rushes."""
