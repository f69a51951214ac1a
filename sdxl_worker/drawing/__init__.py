"""From a request and the models to pictures: the stages, and what each of them needs. No setting is
read here, nothing is fetched, nothing is sent."""
