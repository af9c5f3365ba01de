"""What conversion, training and evaluation share."""
