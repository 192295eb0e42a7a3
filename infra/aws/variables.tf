variable "prefix" {
  description = "Before every name, as buckets are named world-wide: acme gives acme-captures, acme-assets, acme-store."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,40}$", var.prefix))
    error_message = "The prefix consists of 2 to 41 lowercase letters, digits and dashes."
  }
}

variable "notify" {
  description = "ARNs of SNS topics that are told when a notification could not be handled; empty: nobody is."
  type        = list(string)
  default     = []
}
