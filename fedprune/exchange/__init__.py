"""What server and clients say to each other, and how replies are added up."""
