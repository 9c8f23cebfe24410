{{/* Pods that are not ready may always go: in an outage of PostgreSQL or NATS none is, and nodes have to be drained all the same. */}}
{{- define "aftercommit.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "aftercommit.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .pdb.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "aftercommit.selector" . | nindent 6 }}
{{- end -}}
