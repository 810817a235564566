{{/* The specification of the scheduler's Service, the same for Deployments and for a DaskCluster. */}}
{{- define "memusage.serviceSpec" -}}
type: {{ .Values.cluster.scheduler.serviceType }}
selector:
  {{- include "memusage.podSelector" (dict "root" . "role" "scheduler") | fromJson | toYaml | nindent 2 }}
ports:
  - {name: tcp-comm, port: 8786, targetPort: tcp-comm, protocol: TCP}
  - {name: http-dashboard, port: 8787, targetPort: http-dashboard, protocol: TCP}
{{- end -}}
