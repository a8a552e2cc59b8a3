"""Does the model answer rightly: questions with known answers, asked of files it has not seen."""
